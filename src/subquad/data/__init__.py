"""Token streams from documents."""

from subquad.data.batch import Batch
from subquad.data.documents import held_out_text
from subquad.data.overlap import Overlap, check_overlap
from subquad.data.sources import Source, Tokenizer, parse_source
from subquad.data.stream import TokenStream, held_out_batch
from subquad.data.tokenizers import same_tokenizer

__all__ = [
    "Batch",
    "Overlap",
    "Source",
    "TokenStream",
    "Tokenizer",
    "check_overlap",
    "held_out_batch",
    "held_out_text",
    "parse_source",
    "same_tokenizer",
]
