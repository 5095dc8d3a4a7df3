"""Token streams from documents."""

from subquad.data.sources import Source, Tokenizer, parse_source
from subquad.data.stream import TokenStream, held_out_text

__all__ = ["Source", "TokenStream", "Tokenizer", "held_out_text", "parse_source"]
