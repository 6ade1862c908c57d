"""The networks: the sparse transformer, and thin faces of the text encoder and the video autoencoder."""
