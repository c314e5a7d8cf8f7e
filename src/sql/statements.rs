//! SQL texts as statements, with `call(…).field` as everyone writes it.
//!
//! DataFusion reads `column.field` and `call(…)['field']`, but refuses `call(…).field`.

use std::collections::VecDeque;
use std::ops::ControlFlow;

use datafusion::dataframe::DataFrame;
use datafusion::error::{DataFusionError, Result};
use datafusion::prelude::SessionContext;
use datafusion::sql::parser::{CopyToSource, DFParser, Statement};
use datafusion::sql::sqlparser::ast::{AccessExpr, Expr, Value, VisitMut, visit_expressions_mut};

/// Parses statements; `call(…).field` means `call(…)['field']`.
///
/// # Errors
/// Where the text is no SQL.
pub fn parse_statements(text: &str) -> Result<VecDeque<Statement>> {
    let mut statements = DFParser::parse_sql(text)?;
    statements.iter_mut().for_each(name_fields);
    Ok(statements)
}

/// As `SessionContext::sql`, and `call(…).field` means `call(…)['field']`.
///
/// # Errors
/// As `SessionContext::sql`, and when `text` is not one statement.
pub async fn query(context: &SessionContext, text: &str) -> Result<DataFrame> {
    let mut statements = parse_statements(text)?;
    match (statements.pop_front(), statements.pop_front()) {
        (Some(statement), None) => {
            let plan = context.state().statement_to_plan(statement).await?;
            context.execute_logical_plan(plan).await
        }
        _ => Err(DataFusionError::Plan("the text has to be one statement".to_owned())),
    }
}

fn name_fields(statement: &mut Statement) {
    match statement {
        Statement::Statement(statement) => in_all_expressions(statement.as_mut()),
        Statement::CopyTo(copy) => match &mut copy.source {
            CopyToSource::Query(query) => in_all_expressions(query.as_mut()),
            CopyToSource::Relation(_) => {}
        },
        Statement::Explain(explain) => name_fields(&mut explain.statement),
        Statement::CreateExternalTable(_) | Statement::Reset(_) => {}
    }
}

fn in_all_expressions(part: &mut impl VisitMut) {
    // Nothing stops it early.
    let _: ControlFlow<()> = visit_expressions_mut(part, |expr| {
        if let Expr::CompoundFieldAccess { access_chain, .. } = expr {
            for access in access_chain {
                if let AccessExpr::Dot(Expr::Identifier(field)) = access {
                    let name = match field.quote_style {
                        Some(_) => field.value.clone(),
                        None => field.value.to_lowercase(), // as every name that is not quoted
                    };
                    *access = AccessExpr::Dot(Expr::Value(Value::SingleQuotedString(name).into()));
                }
            }
        }
        ControlFlow::Continue(())
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_of_calls_are_named() {
        for (written, read) in [
            ("SELECT f(x).Label", "SELECT f(x).'label'"),
            (
                "SELECT f(x)[2].\"Label\" FROM t WHERE f(x).a.b > 1",
                "SELECT f(x)[2].'Label' FROM t WHERE f(x).'a'.'b' > 1",
            ),
            ("EXPLAIN SELECT t.c, f((SELECT g(y).z))", "EXPLAIN SELECT t.c, f((SELECT g(y).'z'))"),
            ("COPY (SELECT f(x).a FROM t) TO 'x.csv'", "COPY (SELECT f(x).'a' FROM t) TO x.csv"),
        ] {
            assert_eq!(parse_statements(written).unwrap()[0].to_string(), read);
        }
        assert_eq!(parse_statements("SELECT 1; SELECT f(x).a;").unwrap().len(), 2);
    }
}
