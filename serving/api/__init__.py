"""The HTTP surface: requests in, tokens and errors out."""
