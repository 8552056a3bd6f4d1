"""Making and inspecting label maps: dense annotators, the generator, figures of quality."""
