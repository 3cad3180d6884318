"""The Auto classes know LoTLIP after `import lotlip_hf`, whatever was imported before."""

import subprocess
import sys
from pathlib import Path

import pytest

import lotlip_hf

LOADED = """
from transformers import AutoConfig, AutoModel, AutoModelForZeroShotImageClassification, AutoProcessor, AutoTokenizer
folder = sys.argv[1]
print(*(type(auto.from_pretrained(folder)).__name__ for auto in (AutoConfig, AutoModel,
    AutoModelForZeroShotImageClassification, AutoTokenizer, AutoProcessor)))
print(type(AutoModel.from_pretrained(folder, config=AutoConfig.from_pretrained(folder).text_config)).__name__)
"""


FIRST = [
    "from transformers import AutoModel, AutoProcessor; import lotlip_hf",
    "import lotlip_hf.modeling.modeling_lotlip",
    # imported in the middle of what ours need, and after an import that failed
    """
import lotlip_hf
try:
    import transformers.models.bert.nothing
except ImportError:
    pass
from transformers import Trainer
""",
]
# peft imports bitsandbytes, which prints at its import that it lacks a kernel
WITHOUT_PEFT = """
import lotlip_hf.search, lotlip_hf.embed, lotlip_hf.training.loop, lotlip_hf.evaluation.evaluate
assert not {"peft", "bitsandbytes"} & sys.modules.keys()
"""
# Every code in a process of its own that has imported nothing but torch
FORKED = """
import os, sys, torch
torch.set_num_threads(1)
assert not {"transformers", "lotlip_hf"} & sys.modules.keys()
for code in sys.argv[2:]:
    child = os.fork()
    if child == 0:
        exec(code, {"sys": sys})
        sys.stdout.flush()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, code
"""


@pytest.mark.slow
def test_imports_in_fresh_processes(official_checkpoint: Path) -> None:
    """The Auto classes know LoTLIP, whatever came first; only those who use peft import it."""
    codes = [f"{first}\n{LOADED}" for first in FIRST]
    command = [sys.executable, "-c", FORKED, str(official_checkpoint), *codes, WITHOUT_PEFT]
    completed = subprocess.run(command, capture_output=True, text=True, check=False)
    assert completed.returncode == 0, completed.stderr
    classes = ["LoTLIPConfig", "LoTLIPModel", "LoTLIPModel", "LoTLIPTokenizer", "LoTLIPProcessor", "LoTLIPTextModel"]
    assert completed.stdout.split() == classes * len(FIRST)


def test_public_names() -> None:
    assert lotlip_hf._MODULES.keys() >= set(lotlip_hf.__all__) <= set(dir(lotlip_hf))
    for name in lotlip_hf.__all__:
        assert getattr(lotlip_hf, name).__name__ == name
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = lotlip_hf.nothing
