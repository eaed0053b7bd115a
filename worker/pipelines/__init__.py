"""How each kind of model makes pictures. One file a kind: the file's name is what a model's `pipeline` says."""
