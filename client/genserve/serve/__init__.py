"""Server control: fetch tritonserver, render the model repository, start and watch the server."""
