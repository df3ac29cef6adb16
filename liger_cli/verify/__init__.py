"""`liger verify`: the ops of this device, and a model patched against itself as it was."""
