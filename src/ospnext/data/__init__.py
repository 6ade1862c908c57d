"""From a folder of videos to a training set: annotations, probes, filters, the store, and the loader that reads it."""
