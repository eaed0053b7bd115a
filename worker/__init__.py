"""One supervised process per GPU: claims tasks, runs the model in process, stores the pictures."""
