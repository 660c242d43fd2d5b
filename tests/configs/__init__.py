"""Tests: configs."""
