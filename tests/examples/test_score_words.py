"""`examples/score_words.py`, run as it is on a tiny checkpoint: a run reads what it writes."""

import json
import re
from pathlib import Path

import pytest

from lotlip_hf.data.masking import WordScores
from lotlip_hf.metrics import word_alignment
from lotlip_hf.scenes.dataset import long_captions, render, scene, short_caption
from lotlip_hf.scenes.small import small_model
from scripts import load_script


def test_the_scores_of_each_caption(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for part in small_model(hidden_size=32, num_hidden_layers=1):
        part.save_pretrained(tmp_path / "checkpoint")
    (tmp_path / "pictures").mkdir()
    rows = []
    for one in map(scene, range(3)):
        render(one, image_size=32).save(tmp_path / "pictures" / f"{one.id}.png")
        rows.append({"file_name": f"{one.id}.png", "short_caption": short_caption(one)})
        rows[-1] |= {"long_captions": long_captions(one), "rewrites": ["two cats"]}
    (tmp_path / "pictures" / "metadata.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    paths = {"--model": tmp_path / "checkpoint", "--data": tmp_path / "pictures", "--output": tmp_path / "words.jsonl"}
    argv = [str(word) for pair in paths.items() for word in pair]
    main = load_script("examples/score_words.py").main
    scores = WordScores(main([*argv, "--batch-size", "2"]))
    assert len(scores) == 3
    for row in rows:
        (expected,) = word_alignment(
            [tmp_path / "pictures" / row["file_name"]], [row["short_caption"]], str(tmp_path / "checkpoint")
        )
        texts = scores.texts(row["file_name"])
        assert len(texts) == 2 + len(row["long_captions"])
        assert [word for word, _ in texts[-1]] == ["two", "cats"]
        assert [word for word, _ in texts[0]] == [word.text for word in expected]
        assert [value for _, value in texts[0]] == pytest.approx([word.value for word in expected], abs=1e-6)
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(argv)
    assert re.search(r"words\.jsonl: exists already.*--overwrite", " ".join(capsys.readouterr().err.split()))
    assert len(WordScores(main([*argv, "--overwrite"]))) == 3
