# SPDX-License-Identifier: Apache-2.0
"""A slim SVG is the same picture."""

import re
from xml.etree import ElementTree

from vlm_jax.reports import svg

PICTURE = """<?xml version="1.0" encoding="utf-8" standalone="no"?>
<!DOCTYPE svg PUBLIC "-//W3C//DTD SVG 1.1//EN" "x.dtd">
<svg xmlns="http://www.w3.org/2000/svg" width="72pt" height="36pt" viewBox="0 0 72 36">
 <metadata>made by</metadata>
 <!-- 9.81k -->
 <g transform="translate(53.475081 168.352337) scale(0.015625 -0.075)">
  <path d="M 1172.123456 -31.199999
L 0.000123 29
z
" style="stroke-width: 0.8"/>
  <use x="114.59017" y="-5.000001"/><text>a  b</text>
 </g>
</svg>
"""


def shape(text):
    """Tag, attributes and text of every element, numbers of coordinates as numbers."""
    elements = []
    for element in ElementTree.fromstring(text).iter():
        fields = {
            k: [float(x) for x in re.findall(r"-?[\d.]+", v)] + re.findall(r"[A-Za-z]+", v)
            for k, v in element.attrib.items()
        }
        elements.append((element.tag.split("}")[1], fields, (element.text or "").strip()))
    return elements


def test_coordinates_move_by_less_than_a_hundredth_of_a_point_and_nothing_else_changes():
    before, after = shape(PICTURE), shape(svg.slim(PICTURE))
    before = [element for element in before if element[0] != "metadata"]
    assert [(tag, text, set(fields)) for tag, fields, text in before] == [
        (tag, text, set(fields)) for tag, fields, text in after
    ]
    for (_, old, _), (_, new, _) in zip(before, after, strict=True):
        for name, values in old.items():
            assert len(values) == len(new[name])
            for x, y in zip(values, new[name], strict=True):
                assert x == y if isinstance(x, str) else abs(x - y) <= 0.005
    assert "scale(0.015625 -0.075)" in svg.slim(PICTURE)
    assert len(svg.slim(PICTURE)) < 0.75 * len(PICTURE)
