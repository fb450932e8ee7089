//! Turns the commented descriptors of `specattn.v1` into docs/api.md.

use std::collections::HashMap;
use std::fmt::Write;

use prost_types::field_descriptor_proto::{Label, Type};
use prost_types::{DescriptorProto, FieldDescriptorProto, FileDescriptorProto, FileDescriptorSet};

/// Field numbers of descriptor.proto, as paths to comments spell them.
const MESSAGES: i32 = 4;
const ENUMS: i32 = 5;
const SERVICES: i32 = 6;
const MEMBERS: i32 = 2;

/// A file and its comments by path.
struct File<'a> {
    proto: &'a FileDescriptorProto,
    comments: HashMap<&'a [i32], String>,
}

impl<'a> File<'a> {
    fn new(proto: &'a FileDescriptorProto) -> Self {
        let mut comments = HashMap::new();
        for location in proto
            .source_code_info
            .iter()
            .flat_map(|info| &info.location)
        {
            let text = location.leading_comments();
            if !text.is_empty() {
                let words: Vec<&str> = text.split_whitespace().collect();
                comments.insert(location.path.as_slice(), words.join(" "));
            }
        }
        Self { proto, comments }
    }

    fn comment(&self, path: &[i32]) -> &str {
        self.comments.get(path).map_or("", String::as_str)
    }

    fn write(&self, page: &mut String) -> std::fmt::Result {
        let title = self.proto.name().rsplit('/').next().unwrap_or_default();
        writeln!(page, "\n## {title}")?;
        // The comment above `syntax` speaks of the file.
        let about = self.comment(&[12]);
        if !about.is_empty() {
            writeln!(page, "\n{about}")?;
        }
        for (at, service) in (0..).zip(&self.proto.service) {
            writeln!(page, "\n### {}", service.name())?;
            writeln!(
                page,
                "\n| call | request | answer | |\n| --- | --- | --- | --- |"
            )?;
            for (member, method) in (0..).zip(&service.method) {
                let stream = |yes| if yes { "stream of " } else { "" };
                writeln!(
                    page,
                    "| `{}` | {}{} | {}{} | {} |",
                    method.name(),
                    stream(method.client_streaming()),
                    link(method.input_type()),
                    stream(method.server_streaming()),
                    link(method.output_type()),
                    cell(self.comment(&[SERVICES, at, MEMBERS, member])),
                )?;
            }
        }
        for (at, kind) in (0..).zip(&self.proto.enum_type) {
            writeln!(page, "\n### {}", kind.name())?;
            self.say(page, &[ENUMS, at])?;
            writeln!(page, "\n| value | number | |\n| --- | --- | --- |")?;
            for (member, value) in (0..).zip(&kind.value) {
                let comment = cell(self.comment(&[ENUMS, at, MEMBERS, member]));
                writeln!(
                    page,
                    "| `{}` | {} | {comment} |",
                    value.name(),
                    value.number()
                )?;
            }
        }
        for (at, message) in (0..).zip(&self.proto.message_type) {
            writeln!(page, "\n### {}", message.name())?;
            self.say(page, &[MESSAGES, at])?;
            if message.field.is_empty() {
                continue;
            }
            writeln!(page, "\n| field | type | |\n| --- | --- | --- |")?;
            for (member, field) in (0..).zip(&message.field) {
                let comment = cell(self.comment(&[MESSAGES, at, MEMBERS, member]));
                let kind = type_of(message, field);
                writeln!(
                    page,
                    "| `{}` = {} | {kind} | {comment} |",
                    field.name(),
                    field.number()
                )?;
            }
        }
        Ok(())
    }

    fn say(&self, page: &mut String, path: &[i32]) -> std::fmt::Result {
        let comment = self.comment(path);
        if comment.is_empty() {
            Ok(())
        } else {
            writeln!(page, "\n{comment}")
        }
    }
}

/// The page.
pub(crate) fn page(files: &FileDescriptorSet) -> Result<String, std::fmt::Error> {
    let mut page = "# The gRPC API\n\nPackage `specattn.v1`, from the comments of `proto/specattn/v1/*.proto`. Written by \
                    `cargo run -p specattn-proto --example generate`; do not edit.\n"
        .to_owned();
    for file in &files.file {
        if file.package() == "specattn.v1" {
            File::new(file).write(&mut page)?;
        }
    }
    Ok(page)
}

fn cell(text: &str) -> String {
    text.replace('|', "\\|")
}

/// A message's name as a link to where the page tells of it.
fn link(name: &str) -> String {
    let short = name.rsplit('.').next().unwrap_or(name);
    format!("[{short}](#{})", short.to_lowercase())
}

fn type_of(message: &DescriptorProto, field: &FieldDescriptorProto) -> String {
    let name = match field.r#type() {
        Type::Message | Type::Enum => {
            let entry = message.nested_type.iter().find(|nested| {
                field
                    .type_name()
                    .ends_with(&format!(".{}.{}", message.name(), nested.name()))
            });
            if let Some(entry) = entry {
                let kinds: Vec<String> = entry
                    .field
                    .iter()
                    .map(|part| type_of(entry, part))
                    .collect();
                return format!("map of {}", kinds.join(" to "));
            }
            link(field.type_name())
        }
        other => other
            .as_str_name()
            .trim_start_matches("TYPE_")
            .to_lowercase(),
    };
    match field.label() {
        Label::Repeated => format!("list of {name}"),
        _ if field.proto3_optional() => format!("{name}, optional"),
        _ if field.oneof_index.is_some() => {
            let at = usize::try_from(field.oneof_index()).unwrap_or_default();
            format!("{name}, one of `{}`", message.oneof_decl[at].name())
        }
        _ => name,
    }
}
