# SPDX-License-Identifier: Apache-2.0
"""Commands keep the memory that they free, in whatever thread."""

import subprocess
import sys

# A verb whose second thread frees and takes 100 MB again and again, beside those of the command.
VERB = """
import resource, threading, types
from vlm_jax import __main__ as door

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def run(options):
    def work():
        bytearray(100_000_000)
        before = faults()
        for _ in range(20):
            bytearray(100_000_000)
        print(faults() - before)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    return 0

options, verb = types.SimpleNamespace(verb="fit"), types.SimpleNamespace(run=run)
door.parser.command = lambda argv: (options, verb)
door.main([])
"""


def test_a_command_reuses_what_it_freed():
    """20 blocks have 488,000 pages; one has 24,400."""
    done = subprocess.run([sys.executable, "-c", VERB], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 24_400
