"""What comes out: artefacts, the proof that they compute the same, and the report. Knows nothing of Ultralytics."""
