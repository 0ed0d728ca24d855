"""What reports share: documents, pages, words, and tests of differences."""
