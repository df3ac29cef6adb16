"""Several processes that train one model: started, watched, and ended with one reason."""
