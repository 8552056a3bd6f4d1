"""Speed and memory as ratios against named peers; one command each."""
