# SPDX-License-Identifier: Apache-2.0
"""Questions are prepared ahead, and an image is reduced to what V tokens show."""

from vlm_jax.serving import asking


def test_a_reduced_image_has_the_pixels_of_v_patches():
    assert [asking.reduced(336, V, 576) for V in (1, 36, 144, 576)] == [14, 84, 168, 336]


def test_work_is_done_ahead_in_order_and_no_further_than_asked():
    started = []
    made = asking.ahead(lambda i: started.append(i) or i, range(20), 3)
    assert next(made) == 0
    assert len(started) <= 4 and list(made) == list(range(1, 20))
