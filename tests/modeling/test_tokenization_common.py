"""transformers' own tests of tokenizers and processors on ours."""

import functools
import shutil
import tempfile
import unittest
from pathlib import Path
from unittest import mock

import pytest
from transformers import BertTokenizer, CLIPImageProcessorPil

from lotlip_hf import LoTLIPProcessor, LoTLIPTokenizer
from lotlip_hf.images import official_image_processor
from tiny_tokenizers import GOLDEN, official_clean
from upstream import upstream

pytestmark = pytest.mark.slow

common = upstream("test_tokenization_common")
backend = upstream("test_tokenizers_backend_mixin")


class SavedTokenizer:
    """transformers' tests load their tokenizer from the Hub: here from a folder, made from the golden vocabulary."""

    tokenizer_class = LoTLIPTokenizer
    rust_tokenizer_class = LoTLIPTokenizer
    from_pretrained_kwargs = {}

    @classmethod
    def setUpClass(cls) -> None:
        cls.folder = tempfile.mkdtemp()
        LoTLIPTokenizer.from_pretrained(GOLDEN).save_pretrained(cls.folder)
        cls.from_pretrained_id = cls.folder
        super().setUpClass()

    @classmethod
    def tearDownClass(cls) -> None:
        super().tearDownClass()
        shutil.rmtree(cls.folder)


class LoTLIPTokenizationTest(SavedTokenizer, common.TokenizerTesterMixin, unittest.TestCase):
    @classmethod
    def setUpClass(cls) -> None:
        super().setUpClass()
        bert = BertTokenizer(vocab=str(GOLDEN / "vocab.txt"))
        text = official_clean("[SEP]".join(cls.integration_test_input_string.split(". ")))
        cls.integration_expected_tokens = bert.tokenize(text)
        cls.integration_expected_token_ids = bert.encode(text, add_special_tokens=False)
        cls.integration_expected_decoded_text = bert.decode(cls.integration_expected_token_ids)

    def get_extracted_tokenizer(self, reference_tokenizer=None):
        """From a vocabulary, which for this class is always WordPiece's: upstream asks the class for its model."""
        vocab, *_ = common.TokenizersExtractor(str(Path(self.folder) / "tokenizer.json")).extract()
        return LoTLIPTokenizer(vocab=vocab)

    def test_tokenize_special_tokens(self) -> None:
        """Upstream reads special tokens from a text, which this class does when told to."""
        reading = functools.partial(self.get_tokenizer, split_special_tokens=False)
        with mock.patch.object(type(self), "get_tokenizer", reading):
            super().test_tokenize_special_tokens()

    def test_conversion_reversible(self) -> None:
        """Upstream marks it slow, for slow tokenizers."""
        test = common.TokenizerTesterMixin.test_conversion_reversible
        getattr(test, "__wrapped__", test)(self)


class LoTLIPTokenizersBackendTest(SavedTokenizer, backend.TokenizersBackendTesterMixin, unittest.TestCase):
    pass


class LoTLIPProcessorTest(upstream("test_processing_common").ProcessorTesterMixin, unittest.TestCase):
    processor_class = LoTLIPProcessor

    @classmethod
    def _setup_tokenizer(cls) -> LoTLIPTokenizer:
        return LoTLIPTokenizer.from_pretrained(GOLDEN, model_max_length=126)

    @classmethod
    def _setup_image_processor(cls) -> CLIPImageProcessorPil:
        return official_image_processor()
