// Turns a model's Markdown into safe HTML: no scripts, no images, no remote content of any kind.

import DOMPurify from "dompurify";
import { marked } from "marked";

const TAGS = ["p", "br", "strong", "em", "del", "code", "pre", "ul", "ol", "li", "blockquote", "h3", "h4", "table", "thead", "tbody", "tr", "th", "td", "hr"];

export function toHtml(markdown: string): string {
  const html = marked.parse(markdown, { async: false, gfm: true, breaks: true });
  // The page's own headings stop at level 2.
  const lowered = html.replace(/<(\/?)h[1-6]/g, "<$1h3");
  return DOMPurify.sanitize(lowered, { ALLOWED_TAGS: TAGS, ALLOWED_ATTR: [] });
}
