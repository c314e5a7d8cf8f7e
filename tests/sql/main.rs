//! Models in SQL: values by sqllogictest files, what was computed for them by the operator's metrics.

mod command;
mod plans;
mod scripts;
mod support;
