"""From prompts to videos: the pipeline for Python (``pipeline``) and the command (``run``)."""
