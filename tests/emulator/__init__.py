"""Tests of the emulator alone: they use nothing else of cuflash."""
