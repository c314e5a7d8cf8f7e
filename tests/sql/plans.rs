//! One inference a row, whatever the plan looks like.

use std::time::Duration;

use arrow::array::{Array, AsArray};
use arrow::datatypes::{Float32Type, Int64Type};
use datafusion::prelude::SessionConfig;
use futures::StreamExt;
use mistral_batch::sql;

use super::support::*;

const ROWS: usize = 1000;

#[test]
fn a_call_is_computed_once_however_often_it_is_used() {
    let runtime = runtime();
    let context = runtime.block_on(session());
    let answer = ask(
        &runtime,
        &context,
        "SELECT ai_classify(text).label, ai_classify(text).score, ai_classify(text, 'tickets').label AS again
         FROM tickets WHERE ai_classify(text).label = 'billing' ORDER BY ai_classify(text).score DESC",
    );
    assert_eq!(answer.operators("InferExec"), 1, "{}", answer.shown());
    assert_eq!(answer.rows_inferred(), ROWS);
    assert!(answer.rows.num_rows() > 100 && answer.texts(0).iter().all(|label| label.as_deref() == Some("billing")));
    assert_eq!(answer.texts(0), answer.texts(2));
    let scores = answer.rows.column(1).as_primitive::<Float32Type>().values();
    assert!(scores.is_sorted_by(|a, b| a >= b));
    // What EXPLAIN ANALYZE shows.
    assert!(answer.metric("batches") > 10 && answer.metric("tokens") > ROWS);
    assert!(answer.metric("padding") >= answer.metric("tokens"), "the total of the ratio is the padded tokens");
    assert!(answer.metric("device_time") > 0);
    assert_eq!((answer.metric("rows_null"), answer.metric("rows_failed")), (0, 0));
}

#[test]
fn cheap_filters_go_first_and_what_nobody_reads_is_not_computed() {
    let runtime = runtime();
    let context = runtime.block_on(session());
    let count = |condition: &str| {
        let rows = ask(&runtime, &context, &format!("SELECT count(*) FROM tickets WHERE {condition}"));
        rows.rows.column(0).as_primitive::<Int64Type>().value(0) as usize
    };
    let cheap = "topic = 'bug' AND length(text) > 100";
    let filtered =
        ask(&runtime, &context, &format!("SELECT id FROM tickets WHERE ai_classify(text).label = 'bug' AND {cheap}"));
    assert_eq!(filtered.rows_inferred(), count(cheap), "{}", filtered.shown());

    for query in [
        "SELECT id FROM (SELECT id, ai_classify(text) AS c FROM tickets) ORDER BY id",
        "SELECT count(*) FROM (SELECT ai_classify(text).label AS label, id FROM tickets)",
        "WITH c AS (SELECT id, ai_embed(ai_generate(text, {max_tokens: 1}), 'embedder') AS v FROM tickets) \
         SELECT max(id) FROM c",
    ] {
        let answer = ask(&runtime, &context, query);
        assert_eq!((answer.operators("InferExec"), answer.rows_inferred()), (0, 0), "{query}\n{}", answer.shown());
    }
}

#[test]
fn a_limit_stops_early() {
    let runtime = runtime();
    let context = runtime.block_on(session());
    let limited = ask(&runtime, &context, "SELECT ai_classify(text).label FROM tickets LIMIT 7");
    assert_eq!((limited.rows.num_rows(), limited.rows_inferred()), (7, 7), "{}", limited.shown());
    let offset = ask(&runtime, &context, "SELECT ai_classify(text).label FROM tickets LIMIT 5 OFFSET 20");
    assert_eq!((offset.rows.num_rows(), offset.rows_inferred()), (5, 5), "rows that are skipped cost nothing");
    // A fifth of the rows pass, so that the first small window holds enough of them.
    let filtered = ask(&runtime, &context, "SELECT id FROM tickets WHERE ai_classify(text).label = 'billing' LIMIT 3");
    assert_eq!(filtered.rows.num_rows(), 3);
    assert_eq!(filtered.rows_inferred(), 64, "one window; {}", filtered.shown());
    let sorted = ask(&runtime, &context, "SELECT id FROM tickets ORDER BY ai_classify(text).score LIMIT 3");
    assert_eq!(sorted.rows_inferred(), ROWS, "sorting needs all");
}

#[test]
fn case_computes_the_rows_whose_branch_is_taken() {
    let runtime = runtime();
    let context = runtime.block_on(session());
    let taken = ask(
        &runtime,
        &context,
        "SELECT topic, CASE WHEN topic = 'bug' THEN ai_classify(text).label
                            WHEN topic = 'praise' THEN upper(ai_classify(text).label)
                            ELSE 'other' END FROM tickets",
    );
    let topics = taken.texts(0);
    let wanted = topics.iter().flatten().filter(|topic| *topic == "bug" || *topic == "praise").count();
    assert_eq!(taken.rows_inferred(), wanted, "{}", taken.shown());
    assert_eq!(taken.metric("rows_null"), 2 * ROWS - wanted, "a call for each branch");
    for (topic, result) in topics.iter().zip(taken.texts(1)) {
        let other = !matches!(topic.as_deref(), Some("bug" | "praise"));
        assert_eq!(result.as_deref() == Some("other"), other, "{topic:?}");
    }

    let elsewhere = ask(
        &runtime,
        &context,
        "SELECT CASE WHEN topic = 'bug' THEN ai_classify(text).score END, ai_classify(text).label FROM tickets",
    );
    assert_eq!((elsewhere.operators("InferExec"), elsewhere.rows_inferred()), (1, ROWS), "needed for all rows anyway");

    let rest = ask(
        &runtime,
        &context,
        "SELECT CASE topic WHEN 'bug' THEN 'x' ELSE ai_classify(text).label END,
                coalesce(nullif(topic, 'bug'), ai_classify(text).label)
         FROM tickets",
    );
    let bugs = topics.iter().flatten().filter(|topic| *topic == "bug").count();
    let mut inferred = rest.metrics("rows_inferred");
    inferred.sort_unstable();
    assert_eq!(inferred, [bugs, ROWS - bugs], "coalesce asks where the first is null; {}", rest.shown());
}

#[test]
fn other_plan_shapes_compute_each_row_once() {
    let runtime = runtime();
    let context = runtime.block_on(session());
    for (query, inferred) in [
        (
            "SELECT ai_classify(text).label AS label, count(*), avg(ai_classify(text).score) FROM tickets GROUP BY label",
            ROWS,
        ),
        ("SELECT ai_classify(text).label FROM tickets GROUP BY ai_classify(text).label HAVING count(*) > 10", ROWS),
        ("SELECT max(ai_classify(text).score) FILTER (WHERE topic = 'bug') FROM tickets WHERE id < 'row-00100'", 25),
        ("SELECT DISTINCT ai_classify(text).label FROM tickets", ROWS),
        ("SELECT DISTINCT ON (ai_classify(text).label) id FROM tickets ORDER BY ai_classify(text).label, id", ROWS),
        ("WITH c AS (SELECT id, ai_classify(text) AS c FROM tickets) SELECT c.label FROM c WHERE c.score > 0.5", ROWS),
        (
            "SELECT row_number() OVER (PARTITION BY ai_classify(text).label ORDER BY ai_classify(text).score) FROM tickets",
            ROWS,
        ),
        ("SELECT id FROM tickets WHERE ai_classify(text).label IN (SELECT 'bug')", ROWS),
        ("SELECT (SELECT count(*) FROM tickets WHERE ai_classify(text).label = 'bug') AS n", ROWS),
        ("SELECT id FROM sorting WHERE EXISTS (SELECT 1 FROM tickets WHERE ai_classify(text).label = 'nothing')", ROWS),
        (
            "SELECT a.id FROM tickets a JOIN (SELECT id, ai_classify(text).label AS l FROM tickets) b ON a.id = b.id \
          WHERE b.l = a.topic",
            ROWS,
        ),
        ("SELECT ai_classify(text).label FROM tickets UNION ALL SELECT ai_classify(text).label FROM pii", ROWS + 600),
        (
            "SELECT s.text FROM (SELECT text FROM tickets WHERE ai_classify(text).score > 0.5) s \
          ORDER BY ai_classify(s.text).label",
            ROWS,
        ),
    ] {
        let answer = ask(&runtime, &context, query);
        if inferred == 25 {
            let bugs = "SELECT count(*) FROM tickets WHERE id < 'row-00100' AND topic = 'bug'";
            let bugs = ask(&runtime, &context, bugs).rows.column(0).as_primitive::<Int64Type>().value(0);
            assert_eq!(answer.rows_inferred(), bugs as usize, "{query}\n{}", answer.shown());
        } else {
            assert_eq!(answer.rows_inferred(), inferred, "{query}\n{}", answer.shown());
        }
    }
}

#[test]
fn calls_nest() {
    let runtime = runtime();
    let context = runtime.block_on(session());
    let query = "SELECT ai_embed(ai_generate(messages, 'sorter'), 'embedder') FROM sorting WHERE id < 'row-00010'";
    let answer = ask(&runtime, &context, query);
    assert_eq!(answer.metrics("rows_inferred"), [10, 10], "{}", answer.shown());
    let alone = ask(&runtime, &context, "SELECT ai_embed(answer, 'embedder') FROM sorting WHERE id < 'row-00010'");
    assert_eq!(answer.rows.column(0), alone.rows.column(0), "the sorter's answers are right");
}

#[test]
fn nulls_and_constants() {
    let runtime = runtime();
    let context = runtime.block_on(session());
    add_texts(&context, "few", &[Some("I was billed twice"), None, Some("")]);
    let answer = ask(&runtime, &context, "SELECT ai_classify(text), ai_classify(text).error FROM few");
    assert_eq!((answer.rows_inferred(), answer.metric("rows_null")), (2, 1));
    assert_eq!((0..3).map(|row| answer.rows.column(0).is_null(row)).collect::<Vec<_>>(), [false, true, false]);
    assert_eq!(answer.texts(1), [None, None, None]);

    for constant in ["'I was billed twice'", "arrow_cast('I was billed twice', 'Dictionary(Int8, LargeUtf8)')"] {
        let answer = ask(&runtime, &context, &format!("SELECT ai_classify({constant}).label"));
        assert_eq!(answer.texts(0), [Some("billing".to_owned())]);
    }
    assert_eq!(ask(&runtime, &context, "SELECT ai_classify(NULL).label").texts(0), [None]);
    assert_eq!(ask(&runtime, &context, "SELECT ai_classify(text).label FROM few WHERE false").rows.num_rows(), 0);
}

#[test]
fn prepared_statements_and_views_work() {
    let runtime = runtime();
    let context = runtime.block_on(session());
    runtime.block_on(async {
        let run = |sql: &'static str| async {
            mistral_batch::sql::query(&context, sql).await.unwrap().collect().await.unwrap()
        };
        run("PREPARE label(VARCHAR, VARCHAR) AS SELECT ai_classify($1).label, id FROM tickets WHERE id < $2").await;
        run("CREATE VIEW labelled AS SELECT id, topic, ai_classify(text) AS c FROM tickets").await;
    });
    let executed = ask(&runtime, &context, "EXECUTE label('I was billed twice', 'row-00003')");
    assert_eq!(executed.texts(0), vec![Some("billing".to_owned()); 3]);
    assert_eq!(executed.rows_inferred(), 3);
    let viewed = ask(&runtime, &context, "SELECT id FROM labelled WHERE c.label <> topic AND topic = 'bug'");
    let bugs = ask(&runtime, &context, "SELECT id FROM tickets WHERE topic = 'bug'").rows.num_rows();
    assert_eq!(viewed.rows_inferred(), bugs, "{}", viewed.shown());
    assert_eq!(ask(&runtime, &context, "SELECT max(id) FROM labelled").rows_inferred(), 0);
}

#[test]
fn partitions_share_one_engine_and_give_the_same_rows() {
    let runtime = runtime();
    let models = models();
    let one = runtime.block_on(session_with(SessionConfig::new().with_target_partitions(1), models.clone()));
    let query = "SELECT id, ai_classify(text).label FROM tickets WHERE length(text) > 10 ORDER BY id";
    let expected = ask(&runtime, &one, query);

    let config = SessionConfig::new()
        .with_target_partitions(2)
        .with_batch_size(100)
        .set_usize("datafusion.optimizer.repartition_file_min_size", 0);
    let two = runtime.block_on(session_with(config, models));
    let rows = expected.rows.clone();
    two.register_batch("all_rows", rows).unwrap();
    let split = "SELECT id, ai_classify(text).label FROM (
        SELECT id, text FROM tickets WHERE id < 'row-00500' UNION ALL SELECT id, text FROM tickets WHERE id >= 'row-00500'
    ) ORDER BY id";
    let answer = ask(&runtime, &two, split);
    assert_eq!(answer.texts(0), expected.texts(0));
    assert_eq!(answer.texts(1), expected.texts(1));
    assert_eq!(answer.rows_inferred(), ROWS);
    assert!(answer.plan.children()[0].properties().partitioning.partition_count() >= 1);
    let labels = "ai_classify(text).label";
    let (a, b) = [(); 2].map(|()| format!("SELECT {labels} FROM tickets ORDER BY id")).into();
    let (a, b) = runtime.block_on(async {
        let (a, b) = (sql::query(&two, &a).await.unwrap(), sql::query(&two, &b).await.unwrap());
        tokio::join!(answer_of(a), answer_of(b))
    });
    assert_eq!(a.texts(0), b.texts(0));
}

async fn answer_of(frame: datafusion::dataframe::DataFrame) -> Answer {
    answer(frame).await.unwrap()
}

#[test]
fn a_dropped_query_frees_the_engine() {
    let runtime = runtime();
    let models = models();
    let context = runtime.block_on(session_with(SessionConfig::new().with_target_partitions(1), models.clone()));
    for query in [
        "SELECT ai_classify(a.text || b.text).label FROM tickets a CROSS JOIN tickets b",
        "SELECT ai_generate(a.text || b.text, 'sorter', {max_tokens: 500, ignore_eos: true}) FROM tickets a CROSS JOIN tickets b",
    ] {
        runtime.block_on(async {
            let before = models.progress().tokens.load(std::sync::atomic::Ordering::Relaxed);
            let mut stream = mistral_batch::sql::query(&context, query).await.unwrap().execute_stream().await.unwrap();
            let first = tokio::time::timeout(Duration::from_millis(300), stream.next()).await;
            assert!(first.is_err() || models.progress().tokens.load(std::sync::atomic::Ordering::Relaxed) > before);
            drop(stream);
        });
        // A million rows were asked for; the device is free as soon as the batch that was under way is done.
        let small = ask(&runtime, &context, "SELECT ai_classify('I was billed twice').label");
        assert_eq!(small.texts(0), [Some("billing".to_owned())]);
        let settled = models.progress().tokens.load(std::sync::atomic::Ordering::Relaxed);
        ask(&runtime, &context, "SELECT ai_classify('I was billed twice').label");
        let after = models.progress().tokens.load(std::sync::atomic::Ordering::Relaxed);
        assert!(after - settled < 20_000, "{query} goes on: {} tokens", after - settled);
    }
}

#[test]
fn buffered_rows_are_reserved_in_the_memory_pool() {
    use datafusion::execution::memory_pool::GreedyMemoryPool;
    use datafusion::execution::runtime_env::RuntimeEnvBuilder;
    use std::sync::Arc;

    let runtime = runtime();
    let query = "SELECT id, ai_classify(text).label FROM tickets";
    let with_limit = |bytes: usize| {
        let env =
            RuntimeEnvBuilder::new().with_memory_pool(Arc::new(GreedyMemoryPool::new(bytes))).build_arc().unwrap();
        let config = SessionConfig::new().with_target_partitions(1).with_batch_size(50);
        let context = datafusion::prelude::SessionContext::new_with_config_rt(config, env.clone());
        mistral_batch::sql::register(&context, models()).unwrap();
        let path = project("sample-data/tickets.parquet");
        runtime.block_on(context.register_parquet("tickets", path, Default::default())).unwrap();
        (context, env)
    };
    let (context, env) = with_limit(64 << 10);
    let answer = ask(&runtime, &context, query);
    assert_eq!(answer.rows_inferred(), ROWS, "less is buffered at a time");
    assert_eq!(env.memory_pool.reserved(), 0, "everything is given back");
    let (context, _) = with_limit(100);
    let message = refusal(&runtime, &context, query);
    assert!(message.contains("InferExec") && message.contains("Resources exhausted"), "{message}");
}

#[test]
fn mistakes_are_plan_errors_that_name_the_argument() {
    let runtime = runtime();
    let context = runtime.block_on(session());
    for (query, says) in [
        (
            "SELECT ai_classify(text, 'ticket') FROM tickets",
            "argument 2 (model): no model 'ticket': did you mean 'tickets'?",
        ),
        ("SELECT ai_classify(text, 'pii') FROM tickets", "is a MistralForTokenClassification, but classify needs"),
        ("SELECT ai_score(text, 'tickets') FROM tickets", "use ai_classify"),
        ("SELECT ai_classify(text, 'value') FROM tickets", "use ai_score"),
        ("SELECT ai_classify(1)", "argument 1 (text) has type Int64, but text is needed"),
        ("SELECT ai_classify(text, 3) FROM tickets", "argument 2 (model) has type Int64"),
        ("SELECT ai_classify(text, topic) FROM tickets", "argument 2 (model) must be a text constant"),
        ("SELECT ai_classify()", "ai_classify"),
        ("SELECT ai_classify(text, 'tickets', 3) FROM tickets", "1 to 2 are taken: text, model"),
        ("SELECT ai_embed(text) FROM tickets", "several models fit"),
        ("SELECT ai_generate(text, 'sorter', {max_token: 3}) FROM tickets", "did you mean max_tokens?"),
        ("SELECT ai_generate(text, 'sorter', {max_tokens: 0}) FROM tickets", "max_tokens is 0"),
        ("SELECT ai_generate(text, 'sorter', {max_tokens: 'x'}) FROM tickets", "option max_tokens is x"),
        ("SELECT ai_generate(text, 'sorter', {max_tokens: length(text)}) FROM tickets", "must be a constant"),
        ("SELECT ai_embed(text, 'embedder', {pooling: 'first'}) FROM tickets", "it has to be last or mean"),
        (
            "SELECT a.id FROM tickets a JOIN tickets b ON ai_classify(a.text).label = b.topic",
            "cannot be used in JOIN … ON",
        ),
        ("VALUES (ai_classify('x').label)", "cannot be used in VALUES"),
        (
            "SELECT id, (SELECT count(*) FROM pii WHERE pii.text = ai_classify(tickets.text).label) FROM tickets",
            "column of the outer query",
        ),
        ("SET mistral.on_error = 'maybe'", "it has to be 'null' or 'fail'"),
        ("SET mistral.onerror = 'fail'", "did you mean 'mistral.on_error'?"),
        ("SET mistral.models.x = '/nowhere'", "no such folder"),
    ] {
        let message = refusal(&runtime, &context, query);
        assert!(message.contains(says), "{query}:\n{message}\nlacks: {says}");
    }
}

#[test]
fn explain_shows_the_node_and_analyze_its_metrics() {
    let runtime = runtime();
    let context = runtime.block_on(session());
    let plan = ask(&runtime, &context, "EXPLAIN SELECT ai_classify(text).label FROM tickets WHERE topic = 'bug'");
    let text = plan.texts(1).into_iter().flatten().collect::<String>();
    assert!(text.contains("Infer: ai_classify, model=tickets, argument=tickets.text"), "{text}");
    assert!(text.contains("InferExec: ai_classify, model=tickets"), "{text}");
    let plan = ask(&runtime, &context, "EXPLAIN ANALYZE SELECT ai_classify(text).label FROM tickets LIMIT 100");
    let text = plan.texts(1).into_iter().flatten().collect::<String>();
    for metric in ["rows_inferred=100", "tokens=", "batches=", "padding=", "device_time="] {
        assert!(text.contains(metric), "{metric} is not in {text}");
    }
}

/// A planner that is not DataFusion's own, and knows nothing of ours.
#[derive(Debug)]
struct ForeignPlanner;

#[async_trait::async_trait]
impl datafusion::execution::context::QueryPlanner for ForeignPlanner {
    async fn create_physical_plan(
        &self,
        plan: &datafusion::logical_expr::LogicalPlan,
        session: &dyn datafusion::catalog::Session,
    ) -> datafusion::error::Result<std::sync::Arc<dyn datafusion::physical_plan::ExecutionPlan>> {
        use datafusion::physical_planner::{DefaultPhysicalPlanner, PhysicalPlanner};
        DefaultPhysicalPlanner::default().create_physical_plan(plan, session).await
    }
}

#[test]
fn the_sessions_own_planner_goes_on_planning() {
    use datafusion::execution::session_state::SessionStateBuilder;
    let runtime = runtime();
    let state = SessionStateBuilder::new_with_default_features()
        .with_query_planner(std::sync::Arc::new(ForeignPlanner))
        .build();
    let context = datafusion::prelude::SessionContext::new_with_state(state);
    mistral_batch::sql::register(&context, models()).unwrap();
    add_texts(&context, "few", &[Some("I was billed twice"), None, Some("The app crashes when I open it")]);
    let query = "SELECT id, ai_classify(text).label FROM few WHERE ai_classify(text).score > 0.1
                 AND id IN (SELECT id FROM few WHERE ai_classify(text, 'tickets').label = 'billing')";
    let answer = ask(&runtime, &context, query);
    assert_eq!(answer.texts(1), [Some("billing".to_owned())]);
    assert_eq!(answer.operators("InferExec"), 2);
}
