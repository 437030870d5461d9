"""What a person on call looks at: metrics of the whole application, whichever process is asked."""
