"""HTTP gateway: plain REST, OpenAI's and Cohere's interfaces in front of one or several servers."""
