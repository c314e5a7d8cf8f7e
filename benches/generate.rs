//! New tokens a second of greedy generation: `cargo bench --bench generate -- MODEL [PROMPTS [TOKENS [ROWS]]]`.
//!
//! 16 prompts of about 100 tokens and 64 new tokens each, unless told otherwise; ROWS sequences are live at a time. Then
//! four times as many prompts with a quarter, a half, three quarters or all of the new tokens each, in flight and in static
//! left-padded batches.

use std::sync::Arc;
use std::time::Instant;

use candle_core::Device;
use mistral_batch::generation::{CausalLm, Request, SamplingParams, Scheduler, SchedulerLimits, StaticBatches};
use mistral_batch::model::Checkpoint;
use mistral_batch::text::TextTokenizer;
use mistral_batch::{Error, Result};

fn main() -> Result<()> {
    // Cargo adds --bench.
    let arguments: Vec<String> = std::env::args().skip(1).filter(|argument| argument != "--bench").collect();
    let Some(model) = arguments.first() else {
        eprintln!("usage: cargo bench --bench generate -- MODEL [PROMPTS [TOKENS [ROWS]]]");
        return Ok(());
    };
    let number =
        |place: usize, default: usize| arguments.get(place).and_then(|text| text.parse().ok()).unwrap_or(default);
    let (prompts, new_tokens) = (number(1, 16), number(2, 64));
    let limits = SchedulerLimits { kv_cache_bytes: 8 << 30, max_rows: number(3, prompts), prefill_tokens: 4096 };

    let checkpoint = Checkpoint::open(model)?;
    let tokenizer = TextTokenizer::open(&checkpoint.dir, checkpoint.config.vocab_size)?;
    let start = Instant::now();
    let model = CausalLm::load(&checkpoint, &Device::Cpu)?;
    println!("loaded in {:.2} s", start.elapsed().as_secs_f64());

    let vocab_size = checkpoint.config.vocab_size;
    let request = |row: usize, max_tokens: usize| {
        let prompt_ids = (0..60 + row * 37 % 80).map(|i| ((row * 7919 + i * 104_729) % vocab_size) as u32).collect();
        let params = Arc::new(SamplingParams { max_tokens, ..SamplingParams::default() });
        Request { row, samples: 0..1, random_key: row as u64, prompt_ids, params }
    };

    let mut scheduler = Scheduler::new(&model, &tokenizer, limits);
    for row in 0..prompts {
        scheduler.push(request(row, new_tokens)).map_err(Error::Usage)?;
    }
    let start = Instant::now();
    let (mut decode_seconds, mut decode_tokens) = (0.0, 0);
    while !scheduler.is_idle() {
        let (step, before) = (Instant::now(), scheduler.stats());
        scheduler.step()?;
        let after = scheduler.stats();
        if after.prompt_tokens == before.prompt_tokens {
            decode_seconds += step.elapsed().as_secs_f64();
            decode_tokens += after.completion_tokens - before.completion_tokens;
        }
    }
    let (seconds, stats) = (start.elapsed().as_secs_f64(), scheduler.stats());
    println!(
        "{prompts} prompts, {} prompt tokens, {} new tokens in {} steps and {seconds:.2} s, {} MiB of caches",
        stats.prompt_tokens,
        stats.completion_tokens,
        stats.steps,
        stats.peak_kv_cache_bytes >> 20
    );
    println!(
        "{:.0} new tokens/s overall; steps without a prompt: {:.0} tokens/s; prompts: {:.0} tokens/s",
        stats.completion_tokens as f64 / seconds,
        decode_tokens as f64 / decode_seconds,
        stats.prompt_tokens as f64 / (seconds - decode_seconds)
    );

    let mixed = || (0..4 * prompts).map(|row| request(row, (new_tokens * (1 + row % 4) / 4).max(1)));
    let mut scheduler = Scheduler::new(&model, &tokenizer, limits);
    for request in mixed() {
        scheduler.push(request).map_err(Error::Usage)?;
    }
    let start = Instant::now();
    while !scheduler.is_idle() {
        scheduler.step()?;
    }
    let (in_flight, stats) = (start.elapsed().as_secs_f64(), scheduler.stats());
    let mut batches = StaticBatches::new(&model, &tokenizer, limits);
    for request in mixed() {
        batches.push(request).map_err(Error::Usage)?;
    }
    let start = Instant::now();
    while !batches.is_idle() {
        batches.step()?;
    }
    let (static_seconds, static_stats) = (start.elapsed().as_secs_f64(), batches.stats());
    println!(
        "{} prompts of mixed lengths: {:.0} new tokens/s in {} steps in flight, {:.0} in {} steps in static batches \
         ({:.0}% padding), ratio {:.2}",
        4 * prompts,
        stats.completion_tokens as f64 / in_flight,
        stats.steps,
        static_stats.completion_tokens as f64 / static_seconds,
        static_stats.steps,
        batches.padding().waste_percent(),
        static_seconds / in_flight
    );
    Ok(())
}
