//! Columns in, columns out.
