"""The mathematics of flow matching: paths from data to noise (``path``) and back (``sample``). No I/O, no models."""
