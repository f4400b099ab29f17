from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from curation.captions import CaptionSpan, caption_for, join_spans


def test_a_clip_takes_the_span_that_covers_most_of_it() -> None:
    spans = [CaptionSpan(0, 4, "first", None), CaptionSpan(4, 10, "second", None)]
    assert caption_for(spans, 3, 8) is spans[1]
    assert caption_for(spans, 2, 6) is spans[0]  # a tie goes to the earlier
    assert caption_for(spans, 9, 12) is None  # a third of the clip says too little
    assert caption_for([], 0, 1) is None


def test_a_caption_of_the_whole_video_fits_every_clip() -> None:
    whole = CaptionSpan(0, math.inf, "all of it", None)
    assert caption_for([whole], 1000, 1001) is whole


@given(
    st.lists(
        st.builds(
            CaptionSpan,
            st.integers(0, 2),
            st.sampled_from([3.0, math.inf]),
            st.sampled_from(["a", "b"]),
            st.sampled_from([None, 0.0, 0.5]),
        )
    ),
    st.randoms(),
)
def test_joined_spans_do_not_depend_on_order_or_repeats(spans: list[CaptionSpan], random) -> None:
    joined = join_spans(spans)
    assert set(joined) == set(spans)
    assert len(joined) == len(set(spans))
    shuffled = [*spans, *spans]
    random.shuffle(shuffled)
    assert join_spans(shuffled) == joined
    assert [s.start_s for s in joined] == sorted(s.start_s for s in joined)
