"""CLIP models over HTTP: OpenAI's embeddings, zero-shot labels, Immich's and Weaviate's protocols.

`config` says what is served and how, `server` runs it. Each protocol is a module; all of them use
`service`, which has one `AsyncClient` a model, so that requests of many callers are batched.
"""
