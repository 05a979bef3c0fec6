# SPDX-License-Identifier: Apache-2.0
"""Every promise of docs/reliability.md names tests that are there."""

import re

import tiny

PAGE = (tiny.ROOT / "docs/reliability.md").read_text()


def test_every_fault_names_tests_that_are_there():
    rows = [line.split("|") for line in PAGE.splitlines() if line.startswith("| ")][1:]
    assert len(rows) > 20
    wrong = []
    for _, fault, promise, tests, seen, _ in rows:
        files = re.findall(r"`(test_\w+\.py)`", tests)
        assert files and promise.strip(), fault
        assert re.search(r"\d process|in the test", seen), fault
        texts = [(tiny.ROOT / "tests" / file).read_text() for file in files]
        for name in re.findall(r"`(test_\w+)`", tests):
            if not any(f"def {name}(" in text for text in texts):
                wrong.append(f"{fault.strip()}: {name}")
    assert not wrong, "\n".join(wrong)
