//! New tokens a second of in-flight greedy generation: `cargo bench --bench generate -- MODEL [PROMPTS [TOKENS [ROWS]]]`.
//!
//! 16 prompts of about 100 tokens and 64 new tokens each, unless told otherwise; ROWS sequences are live at a time.

use std::sync::Arc;
use std::time::Instant;

use candle_core::Device;
use mistral_batch::generation::{CausalLm, Request, SamplingParams, Scheduler, SchedulerLimits};
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

    let params = Arc::new(SamplingParams { max_tokens: new_tokens, ..SamplingParams::default() });
    let mut scheduler = Scheduler::new(&model, &tokenizer, limits);
    let vocab_size = checkpoint.config.vocab_size;
    for row in 0..prompts {
        let prompt_ids = (0..60 + row * 37 % 80).map(|i| ((row * 7919 + i * 104_729) % vocab_size) as u32).collect();
        let request = Request { row, sample: 0, random_key: row as u64, prompt_ids, params: Arc::clone(&params) };
        scheduler.push(request).map_err(Error::Usage)?;
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
    Ok(())
}
