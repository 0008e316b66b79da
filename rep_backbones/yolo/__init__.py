"""The only part of the package that knows Ultralytics; importing `rep_backbones` registers it (see `install`)."""
