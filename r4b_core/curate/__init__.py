"""The data engine: standardize, generate, verify, score and select records (MMFineReason section 3)."""
