"""Watch one training step at the four models' boundaries, and run it again with one thing changed."""
