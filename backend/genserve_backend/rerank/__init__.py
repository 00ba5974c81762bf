"""The `rerank` model: how relevant each document is to a query."""
