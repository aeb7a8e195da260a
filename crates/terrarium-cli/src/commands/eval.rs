//! `terrarium eval`

use std::path::PathBuf;

use clap::Args;
use indicatif::ProgressBar;
use serde_json::Value;
use terrarium::eval::tasks::Progress;
use terrarium::eval::{Data, EvalOptions, EvalOutcome, Questions, evaluate};
use terrarium::kernels::TrainBackend;
use terrarium::kernels::backend::{BackendTask, with_backend};
use terrarium::runtime::Loaded;
use terrarium::train::StopFlag;

use crate::args::{ComputeArgs, DtypeArgs, TokenizerArgs};
use crate::commands::train::quoted;
use crate::console::Console;
use crate::failure::Failure;
use crate::model::{self, ModelArgs, Source};
use crate::progress::Downloads;
use crate::{interrupt, output, progress};

/// Ask a model the questions of standard tasks.
///
/// Prompts, tokenisation and metrics are those of lm-evaluation-harness, and so is the JSON. Tasks: lambada_openai, hellaswag, piqa, arc_easy, arc_challenge,
/// winogrande, openbookqa, boolq, race, pubmedqa, truthfulqa_mc1, truthfulqa_mc2, nq_open, triviaqa, squadv2, mmlu, and of mmlu a field (mmlu_stem) or a
/// subject (mmlu_anatomy). Documents are those of the data sets on the Hugging Face hub that the harness names, through the shared cache. With --data they are
/// local, and the hub is not asked: DIR/TASK.jsonl, one per line in the fields of the data set, or DIR/TASK.parquet, and DIR/TASK.train.jsonl or
/// DIR/TASK.train.parquet for examples; truthfulqa.jsonl for both of its tasks; mmlu.jsonl and mmlu.dev.jsonl, or mmlu/test/SUBJECT_test.csv and
/// mmlu/dev/SUBJECT_dev.csv. A copy of the data set's repository is read as well (DIR/allenai/ai2_arc/), and so are the forms of llm-foundry (mosaic/), PIQA's
/// own files and llama.cpp's HellaSwag text; the last no longer says where a second sentence begins, which the harness starts with a capital.
#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  terrarium eval --model state-spaces/mamba2-130m --tokenizer EleutherAI/gpt-neox-20b --tasks lambada_openai,piqa --out runs/eval\n  terrarium eval --tasks arc_easy --data test-00000-of-00001.parquet"
)]
pub struct Arguments {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    tokenizer: TokenizerArgs,
    /// Tasks, with commas between them.
    #[arg(short, long, value_delimiter = ',', required = true, value_name = "NAME")]
    tasks: Vec<String>,
    /// Directory of the documents, or the one file of a task's [default: data sets of the Hugging Face hub].
    #[arg(short, long, value_name = "DIR|FILE")]
    data: Option<PathBuf>,
    /// Examples before each question.
    #[arg(long, default_value_t = 0, value_name = "K")]
    num_fewshot: usize,
    /// Documents of each task, from the first; of each subject of mmlu.
    #[arg(long, value_name = "N")]
    limit: Option<usize>,
    /// Longest prompt and answer in tokens; more is cut off at the start [default: the model's, or 2048].
    #[arg(long, value_name = "N")]
    max_length: Option<usize>,
    /// Whether prompts begin as the tokenizer begins texts, with a bos for many [default: as it does by itself].
    #[arg(long, value_name = "BOOL", num_args = 0..=1, default_missing_value = "true")]
    add_bos: Option<bool>,
    /// Tokens computed at once; more is faster and takes more memory.
    #[arg(long, default_value_t = 4096, value_name = "N")]
    batch_tokens: usize,
    /// Keep every answer and the results there.
    #[arg(short, long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Go on with the answers in the directory.
    #[arg(long, requires = "out")]
    resume: bool,
    #[command(flatten)]
    dtype: DtypeArgs,
    #[command(flatten)]
    compute: ComputeArgs,
    /// Print the results as JSON.
    #[arg(long)]
    json: bool,
}

/// Asks, prints.
pub fn run(arguments: &Arguments, console: &Console) -> Result<(), Failure> {
    model::prepare(&arguments.compute)?;
    let source = arguments.model.source(&arguments.tokenizer, console)?;
    let mut options = EvalOptions {
        tasks: arguments.tasks.clone(),
        data: arguments.data.clone().map_or_else(|| Data::Hub(arguments.model.hub.options()), Data::Local),
        num_fewshot: arguments.num_fewshot,
        limit: arguments.limit,
        max_length: arguments.max_length,
        add_bos: arguments.add_bos,
        batch_tokens: arguments.batch_tokens,
        out_dir: arguments.out.clone(),
        resume: arguments.resume,
        model: arguments.model.model.clone().unwrap_or_else(|| source.dir.display().to_string()),
        stop: StopFlag::new(),
    };
    // Before the model is loaded: what is wrong with tasks or data is known in a moment. Downloads end with Ctrl-C at once.
    let questions = Questions::read(&options, &mut Downloads::new(console))?;
    options.stop = interrupt::graceful()?;
    match with_backend(&arguments.compute.device, Task { arguments, console, options, questions, source: &source })?? {
        EvalOutcome::Finished(results) if arguments.json => output::json(&results),
        EvalOutcome::Finished(results) => table(&results),
        EvalOutcome::Interrupted { answered, questions } => {
            let next = match &arguments.out {
                Some(dir) => format!("the same command with --out {} --resume goes on", quoted(dir)),
                None => "with --out answers are kept".to_string(),
            };
            console.note(format_args!("stopped after {answered} of {questions} questions; {next}"));
            Err(Failure::Interrupted)
        }
    }
}

/// A line per task and metric.
fn table(results: &Value) -> Result<(), Failure> {
    let text = |value: Option<&Value>| match value {
        Some(Value::Number(number)) => number.as_f64().map_or_else(String::new, |number| format!("{number:.4}")),
        Some(Value::String(text)) => text.clone(),
        _ => String::new(),
    };
    output::line(format_args!("{:<40} {:>5} {:<12} {:>9}   stderr", "task", "shots", "metric", "value"))?;
    for (name, entry) in results["results"].as_object().into_iter().flatten() {
        let shots = results["n-shot"].get(name).map_or(String::new(), Value::to_string);
        let named = entry.as_object().into_iter().flatten().filter_map(|(key, value)| Some((key.split_once(',')?, value)));
        for ((metric, filter), value) in named.filter(|((metric, _), _)| !metric.ends_with("_stderr")) {
            let error = text(entry.get(format!("{metric}_stderr,{filter}")));
            output::line(format_args!("{name:<40} {shots:>5} {metric:<12} {:>9}   {error}", text(Some(value))))?;
        }
    }
    Ok(())
}

struct Task<'a> {
    arguments: &'a Arguments,
    console: &'a Console,
    options: EvalOptions,
    questions: Questions,
    source: &'a Source,
}

impl BackendTask for Task<'_> {
    type Output = Result<EvalOutcome, Failure>;

    fn run<B: TrainBackend>(self, device: &B::Device) -> Self::Output {
        let Self { arguments, console, options, questions, source } = self;
        let loaded = model::load::<B::InnerBackend>(source, arguments.dtype.dtype.into(), &arguments.model.hub, console, device)?;
        let Loaded { model, config, tokenizer, .. } = &loaded;
        model::require_fused::<B::InnerBackend>(config, loaded.dtype)?;
        let mut bar = Bar { console, bar: ProgressBar::hidden() };
        let outcome = evaluate(model, config, tokenizer.as_ref(), questions, &options, &mut bar, device);
        bar.bar.finish_and_clear();
        Ok(outcome?)
    }
}

/// Questions answered.
struct Bar<'a> {
    console: &'a Console,
    bar: ProgressBar,
}

impl Progress for Bar<'_> {
    fn start(&mut self, questions: usize, answered: usize) {
        if answered > 0 {
            self.console.note(format_args!("{answered} of {questions} questions were answered before"));
        }
        self.bar = progress::items(self.console, "answered", questions);
        self.bar.set_position(answered as u64);
        self.bar.reset_eta();
    }

    fn advance(&mut self, questions: usize) {
        self.bar.inc(questions as u64);
    }

    fn note(&mut self, text: &str) {
        self.bar.suspend(|| self.console.note(text));
    }
}
