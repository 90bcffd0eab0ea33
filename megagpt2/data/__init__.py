"""From text to batches: tokenizer, corpus preparation, `.bin/.idx` files, order, batches.

Reading order: `tokenizer.py` (text <-> ids), `sources.py` (files -> documents), `shuffle.py` (external
shuffle), `corpus.py` (documents -> PREFIX_train/PREFIX_valid), `indexed.py` (the files themselves),
`fetch.py` (public vocabularies and evaluation sets).
"""
