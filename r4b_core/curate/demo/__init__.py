"""The demo of the data engine and the stand-in endpoint that it talks to."""
