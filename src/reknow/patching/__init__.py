"""What changes a decoder and can be taken off again: patches, their files, the stack."""
