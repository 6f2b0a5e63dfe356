"""What a stage reads: samples of its corpora, for each process its own."""
