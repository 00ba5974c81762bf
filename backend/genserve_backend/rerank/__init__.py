"""The `rerank` model: the relevance of documents to a query."""
