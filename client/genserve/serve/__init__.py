"""Running a server: fetches tritonserver, renders the model repository, starts it and watches it."""
