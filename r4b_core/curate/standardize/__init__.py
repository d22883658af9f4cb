"""The first stage: rows of any format become clean, checked, unique records (MMFineReason section 3.1)."""
