"""Files of gradient norms that schedules are refined from."""

import fused_warmup as fw


def test_a_header_of_any_case_and_spacing(tmp_path):
    """Steps and one value first, as exports of experiment trackers have them."""
    file = tmp_path / "run.csv"
    file.write_text(" Step ,norm,other\n0,3.0,9.0\n1,2.0,9.0\n2,1.0,9.0\n")
    found = fw.tuning.refinement(file, smoothing=0.0)
    assert found.smoothed.tolist() == [3.0, 2.0, 1.0]
