"""What a threshold keeps, from stored similarities."""

import pandas as pd
from hypothesis import given
from hypothesis import strategies as st

from flows.ablate import Cell, cell, publish
from schemas.config import ManifestsConfig, preset
from schemas.layout import Snapshot, Workspace
from schemas.rows import Clip, Window
from schemas.storage import latest


def clip(number: int) -> Clip:
    return Clip(
        clip_id=f"c{number}",
        shot_id=f"s{number}",
        source_id=f"source{number // 6}",
        uri="/film.mp4",
        index=number,
        start_pts=0,
        end_pts=100,
        start_frame=0,
        end_frame=100,
        num_frames=100,
        start_s=4.0 * number,
        end_s=4.0 * number + 3.6,
        fps=25.0,
        width_px=64,
        height_px=64,
        caption="a red boat",
        caption_source="panda70m_csv",
        matching_score=None,
        trainable_pretrain=True,
        trainable_sft=True,
    )


def window(number: int, similarity: float) -> Window:
    ids = [f"c{i}" for i in (number, number + 1, number + 2)]
    return Window(f"w{number}", "source0", ids, [similarity] * 3, *[similarity] * 4, 0.1)


CLIPS = [clip(n) for n in range(12)]


def test_a_cell_by_hand():
    windows = [window(0, 0.2), window(1, 0.6), window(2, 0.999)]
    found = cell(windows, CLIPS, ManifestsConfig(low=0.5, high=0.9))
    assert (found.input_windows, found.kept_windows, found.below, found.above) == (3, 1, 1, 1)
    assert (found.clips, found.sources, found.mean_similarity) == (3, 1, 0.6)
    assert abs(found.hours * 3600 - 3 * 3.6) < 1e-9


@given(st.lists(st.floats(-1, 1), max_size=9), st.floats(-1, 1), st.floats(-1, 1))
def test_a_higher_threshold_never_adds_a_window(scores, a, b):
    windows = [window(n, score) for n, score in enumerate(scores)]
    low, high = sorted((a, b))
    loose = cell(windows, CLIPS, ManifestsConfig(low=low, high=1.0))
    strict = cell(windows, CLIPS, ManifestsConfig(low=high, high=1.0))
    assert strict.kept_windows <= loose.kept_windows
    for found in (loose, strict):
        left_out = found.below + found.above + found.no_caption
        assert found.kept_windows + left_out == found.input_windows == len(scores)


def test_results_are_plain_parquet_and_named_by_their_content(tmp_path):
    cells: list[Cell] = [cell([window(0, 0.2)], CLIPS, ManifestsConfig(low=x)) for x in (0.0, 0.5)]
    config = preset("tiny").model_copy(update={"workspace": str(tmp_path)})
    folder = publish.fn(config, Snapshot(tmp_path / "snapshot"), cells)
    assert folder == publish.fn(config, Snapshot(tmp_path / "snapshot"), cells)
    assert latest(Workspace(tmp_path).ablations) == folder
    frame = pd.read_parquet(folder / "results.parquet")
    assert list(frame["kept_windows"]) == [1, 0]
    assert frame["mean_similarity"].isna().tolist() == [False, True]
