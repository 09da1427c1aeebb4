-- Notebook to page: the first heading is the title, appendix code folds, figures get captions,
-- and links into the repository lead to its public address (or are plain text without one).
local title, repository

local function fold(cell)
  local body = pandoc.Blocks({pandoc.RawBlock("html", "<details><summary>Code</summary>")})
  body:extend(cell.content)
  body:insert(pandoc.RawBlock("html", "</details>"))
  return body
end

local function figure(paragraph)
  local image = paragraph.content[1]
  if #paragraph.content ~= 1 or image.t ~= "Image" then return nil end
  local caption = image.attributes.caption
  image.attributes.caption = nil
  if not caption then return nil end
  return pandoc.Figure({pandoc.Plain({image})}, pandoc.read(caption, "markdown").blocks)
end

return {
  {Meta = function(meta) repository = pandoc.utils.stringify(meta.repository or "") end},
  {
    Header = function(header)
      if header.level == 1 and not title then
        title = header.content
        return {}
      end
    end,
    Link = function(link)
      if link.target:match("^#") or link.target:match("^%a+:") then return nil end
      if repository == "" then return link.content end
      link.target = repository .. "/blob/main/" .. link.target
      return link
    end,
    Para = figure,
    Math = function(math)  -- MathML has no \tag: the equation's number stands beside it
      local number = math.text:match("\\tag{(.-)}")
      if not number then return nil end
      math.text = math.text:gsub("\\tag{.-}", "")
      return pandoc.Span({math, pandoc.Span("(" .. number .. ")")}, {class = "equation"})
    end,
    Div = function(div)
      -- The table of contents knows only headings that stand in no box.
      if div.classes:includes("markdown") then return div.content end
      if not div.classes:includes("code") then return nil end
      if (div.attributes.tags or ""):find('"appendix"', 1, true) then div.content = fold(div) end
      div.attributes = {}
      return div
    end,
    CodeBlock = function(block)  -- lets a keyboard scroll what is wider than the screen
      block.attributes.tabindex = "0"
      return block
    end,
  },
  {Pandoc = function(document)
    document.meta.title = pandoc.MetaInlines(title or {})
    document.meta.pagetitle = pandoc.utils.stringify(title or {})
    return document
  end},
}
