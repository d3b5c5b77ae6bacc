"""Text in, batches of token ids out: the first room of the system.

corpora.py     names a text, fetches it from a package registry once, and reads it back from the cache
extract.py     takes the documents out of a downloaded archive
synthetic.py   writes a small language of our own, whose right answers are known
tokenizer.py   turns text into ids (bytes, or a released tokenizer.json) and back
loader.py      cuts training and validation text, and deals windows of tokens in an order that a seed fixes

What is simplified against the report (section 4.1): its corpus is 14.8T tokens of many languages, deduplicated and
filtered, with a byte-level BPE of 128K entries, fill-in-the-middle on a tenth of the documents, and randomly split
joined tokens. Here are megabytes of plain text, 257 token ids, and none of these.
"""

from .corpora import Corpus, build_corpus, list_corpora, load_corpus
from .loader import IGNORED, Loader, split_documents, validation_windows
from .synthetic import synthetic
from .tokenizer import ByteTokenizer, Tokenizer, load_tokenizer

__all__ = [
    "IGNORED",
    "ByteTokenizer",
    "Corpus",
    "Loader",
    "Tokenizer",
    "build_corpus",
    "list_corpora",
    "load_corpus",
    "load_tokenizer",
    "split_documents",
    "synthetic",
    "validation_windows",
]
