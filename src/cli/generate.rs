/*! `atom generate`: a text continued, as it comes. */

mod conversation;

use std::io::Read;
use std::path::PathBuf;

use clap::Args;

use super::args::{DeviceFlag, ModelFlag, with_backend};
use super::sampling::SamplingFlags;
use super::{Output, Ui, values};
use crate::backend::{Backend, Decode};
use crate::machine::peak_rss_bytes;
use crate::model::Architecture;
use crate::network::{Decoder, Model, network};
use crate::progress::Progress;
use crate::quant::kv::KvFormat;
use crate::report::generate::{GenerateOutcome, speed};
use crate::serve::{
    self, ChatTemplate, ComparedModel, Finish, Generation, GenerationSettings, Generator, Message,
    Role,
};
use crate::text::{Tokenizer, check_tokens};
use crate::units;
use crate::{Error, Kind, Result};

const EXAMPLES: &str = "\
Examples:
  atom generate --model tiny-llama --prompt Once --max-new-tokens 20
  atom generate --model ./SmolLM2 --chat --prompt Hello
  atom generate --model ./SmolLM2-atom-w4a4-g64 --chat -i --temperature 0.7
  atom generate --model ./SmolLM2-atom-w4a4-g64 --compare ./SmolLM2 --prompt A
  atom generate --model ./Llama --prompt-file question.txt --json > answer.json

The text goes to stdout as it comes; speed and memory go to stderr. By default the most probable token is taken each time \
(--temperature 0), so that a run can be repeated. A file's last line break is no part of the prompt.";

/// Tokens of a conversation where --context says nothing.
const CONTEXT: usize = 4096;

#[derive(Args, Debug)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Arguments {
    #[command(flatten)]
    model: ModelFlag,
    #[command(flatten)]
    prompt: PromptFlags,
    #[command(flatten)]
    sampling: SamplingFlags,
    /// Print what this source makes of the same prompt too, and where the most probable tokens first differ
    #[arg(long, value_name = "SOURCE", help_heading = "Output", conflicts_with_all = ["interactive", "temperature"])]
    compare: Option<String>,
    #[command(flatten)]
    device: DeviceFlag,
}

#[derive(Args, Debug)]
#[command(next_help_heading = "Prompt")]
struct PromptFlags {
    /// The text to continue
    #[arg(long, value_name = "TEXT", required_unless_present_any = ["prompt_file", "interactive"])]
    prompt: Option<String>,
    /// A file with the text to continue; - is stdin
    #[arg(long, value_name = "FILE", conflicts_with = "prompt")]
    prompt_file: Option<PathBuf>,
    /// Continue what you type, line after line. What was said before stays in the cache
    #[arg(short, long, conflicts_with_all = ["json"])]
    interactive: bool,
    /// Take the prompt as a message, and apply the model's chat template
    #[arg(long)]
    chat: bool,
    /// A system message before it
    #[arg(long, value_name = "TEXT", requires = "chat")]
    system: Option<String>,
    /// Tokens of prompt and text together at most [default: as many as are needed; with -i 4096, or the network's
    /// positions if they are fewer]
    #[arg(long, value_name = "TOKENS", value_parser = values::window_length)]
    context: Option<usize>,
    /// Bits of a source's keys and values in the cache, rotated by a Hadamard transform: 2, 3, 4, 8, or 16 for none of it
    #[arg(long, value_name = "BITS", value_parser = values::width)]
    kv_bits: Option<u8>,
}

pub(crate) fn run(arguments: &Arguments, ui: &Ui, output: &Output) -> Result<()> {
    output.check_open()?;
    let backend = arguments.device.open()?;
    let hub = arguments.model.hub(ui)?;
    let model = arguments.model.open(&hub, ui)?;
    let other = match &arguments.compare {
        Some(name) => Some(Model::open(&hub, name, None)?),
        None => None,
    };
    with_backend!(&backend, ui, backend => {
        let session = Session::new(arguments, &model, ui, output)?;
        match &other {
            Some(other) => session.compare(backend, other),
            None if arguments.prompt.interactive => session.converse(backend),
            None => session.continue_once(backend),
        }
    })
}

/// What a run needs of its model besides weights.
struct Session<'a> {
    arguments: &'a Arguments,
    model: &'a Model,
    tokenizer: Tokenizer,
    template: Option<ChatTemplate>,
    settings: GenerationSettings,
    /// Positions of the network.
    positions: usize,
    vocabulary: usize,
    ui: &'a Ui,
    output: &'a Output,
}

impl<'a> Session<'a> {
    fn new(
        arguments: &'a Arguments,
        model: &'a Model,
        ui: &'a Ui,
        output: &'a Output,
    ) -> Result<Self> {
        if arguments.prompt.kv_bits.is_some()
            && matches!(model, Model::Atom(_))
            && arguments.compare.is_none()
        {
            return Err(Error::usage(
                "--kv-bits is for sources: an Atom checkpoint says how its cache is held",
            )
            .hint("leave it out, or quantize the model with another --kv-bits"));
        }
        let architecture = architecture(model, ui)?;
        let positions = architecture.positions();
        if let Some(context) = arguments.prompt.context.filter(|context| *context > positions) {
            return Err(Error::usage(format!(
                "--context {context} is more than the {positions} positions of {}",
                model.name()
            ))
            .hint("give at most as many"));
        }
        let template = arguments.prompt.chat.then(|| ChatTemplate::of(model)).transpose()?;
        Ok(Self {
            tokenizer: model.tokenizer()?,
            template,
            settings: arguments.sampling.settings(model)?,
            vocabulary: architecture.vocabulary,
            arguments,
            model,
            positions,
            ui,
            output,
        })
    }

    /// Tokens of a conversation that has `prompt` tokens so far.
    fn longest(&self, prompt: usize) -> Result<usize> {
        let most = self.arguments.prompt.context.unwrap_or(self.positions);
        if prompt >= most {
            return Err(Error::input(format!(
                "the prompt has {prompt} tokens, and {most} is the most that prompt and text may have together: {}",
                match self.arguments.prompt.context {
                    Some(_) => "--context says so".to_owned(),
                    None => format!("{} has so many positions", self.model.name()),
                }
            ))
            .hint("give a shorter prompt, or a model with more positions"));
        }
        let wanted = match self.arguments.prompt.interactive {
            true => self.arguments.prompt.context.unwrap_or(CONTEXT).max(prompt + 1),
            false => prompt.saturating_add(self.settings.most_new),
        };
        if wanted > most && !self.arguments.prompt.interactive {
            let room = units::counted(most - prompt, "new token");
            self.ui.info(&format!("the context of {most} tokens has room for {room}"));
        }
        Ok(wanted.min(most))
    }

    /// The tokens of what is said first.
    fn first_prompt(&self) -> Result<Option<Vec<u32>>> {
        match self.text()? {
            Some(text) => self.opening(&text).map(Some),
            None => Ok(None),
        }
    }

    /// The tokens of a first text.
    fn opening(&self, text: &str) -> Result<Vec<u32>> {
        let tokens = match self.template {
            Some(_) => self.messages_tokens(&self.messages(text))?,
            None => self.tokenizer.encode(text, self.ui)?,
        };
        check_tokens(&tokens, self.vocabulary, self.tokenizer.path())?;
        Ok(tokens)
    }

    fn messages(&self, text: &str) -> Vec<Message> {
        let system = self.arguments.prompt.system.iter();
        let system = system.map(|text| Message { role: Role::System, content: text.clone() });
        system.chain([Message { role: Role::User, content: text.to_owned() }]).collect()
    }

    fn messages_tokens(&self, messages: &[Message]) -> Result<Vec<u32>> {
        let template = self.template.as_ref().expect("only with --chat");
        self.tokenizer.encode_as_it_is(&template.render(messages)?, self.ui)
    }

    /// The text to continue, if the flags give one.
    fn text(&self) -> Result<Option<String>> {
        let PromptFlags { prompt, prompt_file, .. } = &self.arguments.prompt;
        let Some(path) = prompt_file else { return Ok(prompt.clone()) };
        let mut bytes = Vec::new();
        if path.as_os_str() == "-" {
            std::io::stdin().lock().read_to_end(&mut bytes)?;
        } else {
            bytes = fs_err::read(path)?;
        }
        let mut text = String::from_utf8(bytes).map_err(|_| {
            Error::input(format!("{} is not UTF-8", path.display()))
                .hint("give a text file in UTF-8 (`iconv -t UTF-8` makes one)")
        })?;
        if text.ends_with('\n') {
            text.pop();
        }
        Ok(Some(text))
    }

    fn load<'m, B: Backend + Decode>(
        &self,
        backend: &'m B,
        model: &'m Model,
        longest: usize,
    ) -> Result<Decoder<'m, B>> {
        let kv = match (self.arguments.prompt.kv_bits, model) {
            (Some(16), Model::Source(_)) => Some(KvFormat::FULL),
            (Some(bits), Model::Source(_)) => {
                Some(KvFormat { bits, rotate: true, ..KvFormat::FULL })
            }
            _ => None,
        };
        serve::decoder(backend, model, kv, longest, self.ui)
    }

    /// Continues the prompt of the flags.
    fn continue_once<B: Backend + Decode>(&self, backend: &B) -> Result<()> {
        let prompt = self.first_prompt()?.expect("the parser asks for one");
        self.refuse_nothing(&prompt)?;
        let longest = self.longest(prompt.len())?;
        let decoder = self.load(backend, self.model, longest)?;
        let mut generator =
            Generator::new(&decoder, &self.tokenizer, self.settings.clone(), longest)?;
        let generation = self.generate(&mut generator, prompt)?;
        let finish = generation.finish;
        self.tell(&decoder, &generation);
        if self.output.is_json() {
            self.output.write_json(&self.outcome(&decoder, generation))?;
        }
        interrupted(finish)
    }

    /// Refuses a prompt without tokens, before anything is loaded.
    fn refuse_nothing(&self, prompt: &[u32]) -> Result<()> {
        if prompt.is_empty() {
            return Err(Error::input(
                "the prompt is empty, and the tokenizer begins texts with no token of its own",
            )
            .hint("give some text to continue"));
        }
        Ok(())
    }

    /// A continuation, written as it comes unless JSON is asked for.
    fn generate<B: Backend + Decode>(
        &self,
        generator: &mut Generator<'_, '_, B>,
        prompt: Vec<u32>,
    ) -> Result<Generation> {
        let mut ends_line = true;
        let mut write = |piece: &str| {
            ends_line = piece.ends_with('\n');
            if self.output.is_json() { Ok(true) } else { self.output.write_piece(piece) }
        };
        let made = generator.generate(prompt, &mut write, self.ui);
        if !ends_line && !self.output.is_json() {
            self.output.write_piece("\n")?;
        }
        made
    }

    fn tell<B: Backend + Decode>(&self, decoder: &Decoder<'_, B>, generation: &Generation) {
        let memory = match decoder.backend().peak_bytes() {
            Some(bytes) => format!("{} of GPU memory", units::bytes(bytes)),
            None => format!("{} of memory", units::bytes(peak_rss_bytes())),
        };
        self.ui.info(&format!("{}; {memory} at most", speed(generation)));
    }

    fn outcome<B: Backend + Decode>(
        &self,
        decoder: &Decoder<'_, B>,
        generation: Generation,
    ) -> GenerateOutcome {
        let backend = decoder.backend();
        GenerateOutcome {
            model: self.model.name().to_owned(),
            device: backend.device(),
            kv_bits: decoder.kv().bits,
            seed: self.settings.seed,
            generation,
            peak_rss_bytes: peak_rss_bytes(),
            peak_gpu_bytes: backend.peak_bytes(),
        }
    }

    /// Continues the prompt with both models.
    fn compare<B: Backend + Decode>(&self, backend: &B, other: &Model) -> Result<()> {
        let prompt = self.first_prompt()?.expect("the parser asks for one");
        self.refuse_nothing(&prompt)?;
        let found = architecture(other, self.ui)?;
        check_tokens(&prompt, found.vocabulary, self.tokenizer.path())?;
        let longest = self.longest(prompt.len())?.min(found.positions());
        if longest <= prompt.len() {
            return Err(Error::input(format!(
                "the prompt is too long for the positions of {}",
                other.name()
            ))
            .hint("give a shorter one"));
        }
        let decoders =
            [self.load(backend, self.model, longest)?, self.load(backend, other, longest)?];
        let [first, second] = &decoders;
        let made =
            |decoder| Generator::new(decoder, &self.tokenizer, self.settings.clone(), longest);
        let (mut first_one, mut second_one) = (made(first)?, made(second)?);
        let one = |generator: &mut Generator<'_, '_, B>, decoder, model: &Model| {
            if !self.output.is_json() {
                self.output.write_piece(&format!("--- {}\n", model.name()))?;
            }
            let generation = self.generate(generator, prompt.clone())?;
            self.tell(decoder, &generation);
            interrupted(generation.finish)?;
            Ok::<_, Error>(ComparedModel { model: model.name().to_owned(), generation })
        };
        let models =
            [one(&mut first_one, first, self.model)?, one(&mut second_one, second, other)?];
        let generators = [&mut first_one, &mut second_one];
        let comparison = serve::compare(generators, models, &prompt, &self.tokenizer, self.ui)?;
        self.output.write(&comparison)
    }
}

fn architecture(model: &Model, progress: &dyn Progress) -> Result<Architecture> {
    match model {
        Model::Source(source) => Ok(network(source, progress)?.architecture),
        Model::Atom(checkpoint) => {
            Architecture::read(checkpoint.config(), &checkpoint.config_file())
        }
    }
}

/// An error where the user stopped the text.
fn interrupted(finish: Finish) -> Result<()> {
    match finish {
        Finish::Interrupted => {
            Err(Error::new(Kind::Interrupted, "interrupted: the text ends here"))
        }
        _ => Ok(()),
    }
}
