"""Data: files of examples in, packed rows of token ids out.

What lives here: reading and checking rows (`records`), tokenizers (`tokenizer`), the chat renderer that owns
ids and loss mask (`render`), packing of documents into fixed-length rows (`packing`), the documents of an SFT
run (`sft_data`) and the choice between the C++ module and its Python reference (`native`). What may not:
torch, megatron, or anything that knows about ranks; a data module runs on a login node.
"""
