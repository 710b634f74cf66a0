"""From labelled images to batches of tokens: tokenize, shards, balance, sentences, plan, stream, in the order of the data;
`teacher_cache` lies beside the stream.

`balance`, `sentences` and `plan` are pure functions; `shards` reads and writes files; `tokenize` and `stream` are the
two places where Ray Data works, each with a path that needs no Ray.
"""
